"""What everything that stores descriptors for a service must do, with FdStore at the service's end."""

from __future__ import annotations

from keeper_control import Manager

CAPACITY = 4


class StoreConformance:
    """Subclasses bring a fixture `manager` that holds up to CAPACITY descriptors."""

    def test_memory_that_was_stored_is_there_after_a_kill(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest a", content="memory of a")
        service.ask("keep", name="guest b", content="memory of b")
        service.kill()

        after = manager.next()

        assert sorted(after.ask("names")) == ["guest a", "guest b"]
        assert after.contents("guest a") == ["memory of a"]
        assert after.contents("guest b") == ["memory of b"]

    def test_it_is_the_same_memory_and_not_a_copy(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest", content="before")
        service.ask("write", name="guest", content="behind")
        service.kill()

        assert manager.next().contents("guest") == ["behind"]

    def test_what_is_taken_once_is_not_given_again(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest", content="memory")
        service.kill()
        after = manager.next()

        assert after.ask("take", name="guest") == [{"content": "memory", "inheritable": False}]
        assert after.ask("take", name="guest") == []
        assert after.ask("names") == []

    def test_what_was_taken_is_there_for_the_one_after_too(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest", content="memory")
        service.kill()
        second = manager.next()
        assert second.contents("guest") == ["memory"]
        second.kill()

        assert manager.next().contents("guest") == ["memory"]

    def test_what_was_dropped_is_not_there(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="gone", content="1")
        service.ask("keep", name="stays", content="2")
        service.ask("drop", name="gone")
        service.kill()

        assert manager.next().ask("names") == ["stays"]

    def test_several_under_one_name_all_come_and_all_go(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest", content="low")
        service.ask("keep", name="guest", content="high")
        service.kill()
        second = manager.next()
        assert sorted(second.contents("guest")) == ["high", "low"]
        second.ask("drop", name="guest")
        second.kill()

        assert manager.next().ask("names") == []

    def test_one_open_file_is_stored_once_under_its_first_name(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="guest", content="memory")
        service.ask("keep_as_well", name="guest", other_name="guest")
        service.ask("keep_as_well", name="guest", other_name="another")
        service.kill()

        after = manager.next()

        assert after.ask("names") == ["guest"]
        assert after.contents("guest") == ["memory"]

    def test_what_nobody_took_can_be_let_go_of(self, manager: Manager) -> None:
        service = manager.first()
        service.ask("keep", name="known", content="1")
        service.ask("keep", name="forgotten", content="2")
        service.kill()
        second = manager.next()
        assert second.contents("known") == ["1"]
        second.ask("close_untaken")
        assert second.ask("names") == []
        second.kill()

        assert manager.next().ask("names") == ["known"]

    def test_one_too_many_is_refused_and_the_others_stay(self, manager: Manager) -> None:
        service = manager.first()
        for number in range(CAPACITY):
            service.ask("keep", name=f"guest {number}", content=f"memory {number}")

        refused = service.try_to("keep", name="one more", content="lost")

        assert refused["error"] == "NO_SPACE"
        assert "one more" in refused["message"]
        service.kill()
        after = manager.next()
        assert sorted(after.ask("names")) == [f"guest {number}" for number in range(CAPACITY)]
        assert after.try_to("keep", name="one more", content="lost")["error"] == "NO_SPACE"

    def test_a_place_that_was_dropped_can_be_used_again(self, manager: Manager) -> None:
        service = manager.first()
        for number in range(3 * CAPACITY):
            service.ask("keep", name="guest", content=f"memory {number}")
            if number < 3 * CAPACITY - 1:
                service.ask("drop", name="guest")
        service.kill()

        assert manager.next().contents("guest") == [f"memory {3 * CAPACITY - 1}"]

    def test_the_longest_name_comes_back_whole(self, manager: Manager) -> None:
        name = "~ " * 127 + "!"
        service = manager.first()
        service.ask("keep", name=name, content="memory")
        service.kill()

        assert manager.next().contents(name) == ["memory"]

    def test_the_variables_are_those_of_systemd_and_are_removed(self, manager: Manager) -> None:
        service = manager.first()
        first = service.ask("environment")
        assert first["available"]
        assert first["after"] == {}
        assert set(first["before"]) == {"NOTIFY_SOCKET", "FDSTORE"}
        assert first["before"]["FDSTORE"] == str(CAPACITY)
        service.ask("keep", name="guest a", content="1")
        service.ask("keep", name="guest b", content="2")
        service.kill()

        second = manager.next().ask("environment")

        assert second["after"] == {}
        assert second["before"] == {
            "NOTIFY_SOCKET": first["before"]["NOTIFY_SOCKET"],
            "FDSTORE": str(CAPACITY),
            "LISTEN_PID": str(second["pid"]),
            "LISTEN_FDS": "2",
            "LISTEN_FDNAMES": second["before"]["LISTEN_FDNAMES"],
        }
        assert sorted(second["before"]["LISTEN_FDNAMES"].split(":")) == ["guest a", "guest b"]
