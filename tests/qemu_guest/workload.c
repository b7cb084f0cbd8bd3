/* The guest's program: reads, checks and rewrites pages all over its memory for ever, one worker a vCPU, and answers
 * commands on the second serial port.
 *
 * A command is a line `ID COMMAND [ARGUMENT]`, its answer a line `ID TEXT`; an answer may be lost in a migration, so a
 * command may be sent again with its id: it is carried out once and its answer repeated. Without an id there is only
 * `ready pages=N workers=K`, at the start. Commands:
 *
 *   ready      the line of the start again
 *   verify     check every page while the workers rest: `verified pages=N bad=M first_bad=...`
 *   stats      the counters, as one JSON object
 *   reset      begin the figures of gaps anew
 *   hold, go   let the workers rest; let them go on
 *   rate N     at most N accesses a second and worker; 0: as many as they can
 *   corrupt    flip one byte of a random page behind the checksum's back
 *   quit       end; the guest powers off
 *
 * A page found wrong is counted once, described on the console (the first 32), and never rewritten: it stays wrong.
 *
 * Times are the time stamp counter's. Software emulation stops it with the virtual machine, and the destination goes on
 * from the value that the source saved: the guest's clocks never see the downtime, and no gap contains it. What a
 * running vCPU waits for, a page among others, they do see. Emulation passes the host's frequency through, so figures
 * taken after a move to a host of another frequency are off by the ratio.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include <x86intrin.h>

#include "pages.h"
#include "workers.h"

#define CONTROL_PORT "/dev/ttyS1"
enum { LONGEST_LINE = 128, LONGEST_ANSWER = 512 };

static int control;
static int held;
static struct tally tally;

static void go_on_unless_held(void)
{
    if (!held)
        go_on();
}

static void say_ready(char *answer)
{
    read_tally(&tally);
    snprintf(answer, LONGEST_ANSWER, "ready pages=%lu workers=%u", tally.pages, tally.workers);
}

static void verify(char *answer)
{
    uint64_t bad;

    read_tally(&tally);
    rest();
    bad = check_all();
    snprintf(answer, LONGEST_ANSWER, "verified pages=%lu bad=%lu first_bad=%s", tally.pages, bad, first_bad());
    go_on_unless_held();
}

static void corrupt(char *answer)
{
    uint64_t chance = scrambled(__rdtsc()), page;
    unsigned byte = (unsigned)(chance >> 40) % PAGE_BYTES;

    read_tally(&tally);
    page = chance % tally.pages;
    rest();
    flip(page, byte);
    snprintf(answer, LONGEST_ANSWER, "corrupted page=%lu byte=%u", page, byte);
    go_on_unless_held();
}

static void say_stats(char *answer)
{
    const struct gaps *gaps = &tally.gaps;

    read_tally(&tally);
    snprintf(answer, LONGEST_ANSWER,
             "{\"reads\":%lu,\"writes\":%lu,\"bad\":%lu,\"gaps\":%lu,\"gap_us_p50\":%.1f,\"gap_us_p99\":%.1f,"
             "\"gap_ms_max\":%.3f,\"gaps_over_10ms\":%lu,\"stall_ms\":%.3f,\"step_ms_max\":%.3f,\"uptime\":%.3f}",
             tally.reads, tally.writes, tally.bad, gaps->count, percentile(gaps, 50) / 1e3, percentile(gaps, 99) / 1e3,
             (double)gaps->longest_ns / 1e6, gaps->over_10ms, (double)gaps->total_ns / 1e6,
             (double)gaps->longest_step_ns / 1e6, (double)monotonic_ns() / 1e9);
}

static void carry_out(const char *command, const char *argument, char *answer)
{
    snprintf(answer, LONGEST_ANSWER, "ok");
    if (!strcmp(command, "ready")) {
        say_ready(answer);
    } else if (!strcmp(command, "verify")) {
        verify(answer);
    } else if (!strcmp(command, "stats")) {
        say_stats(answer);
    } else if (!strcmp(command, "reset")) {
        reset_gaps();
    } else if (!strcmp(command, "hold")) {
        held = 1;
        rest();
    } else if (!strcmp(command, "go")) {
        held = 0;
        go_on();
    } else if (!strcmp(command, "rate")) {
        limit_rate(strtoull(argument, NULL, 10));
    } else if (!strcmp(command, "corrupt")) {
        corrupt(answer);
    } else if (strcmp(command, "quit")) {
        snprintf(answer, LONGEST_ANSWER, "error: no such command: %s", command);
    }
}

static void send_line(const char *id, const char *text)
{
    char line[LONGEST_ANSWER + LONGEST_LINE];
    int length = snprintf(line, sizeof line, "%s%s%s\n", id, *id ? " " : "", text);

    for (int sent = 0; sent < length;) {
        ssize_t done = write(control, line + sent, (size_t)(length - sent));

        if (done < 0 && errno != EINTR)
            fail("writing to " CONTROL_PORT);
        sent += done > 0 ? (int)done : 0;
    }
}

static void answer_commands(FILE *input)
{
    static char line[LONGEST_LINE], id[LONGEST_LINE], command[LONGEST_LINE], argument[LONGEST_LINE];
    static char last_id[LONGEST_LINE], answer[LONGEST_ANSWER];
    int whole = 1;

    while (fgets(line, sizeof line, input)) {
        int continued = !whole;

        whole = strchr(line, '\n') != NULL;
        *argument = 0;
        /* Too long, empty, or what a migration left of a line. */
        if (continued || !whole || sscanf(line, "%s %s %s", id, command, argument) < 2)
            continue;
        if (strcmp(id, last_id)) {
            carry_out(command, argument, answer);
            strcpy(last_id, id);
        }
        send_line(id, answer);
        if (!strcmp(command, "quit")) {
            tcdrain(control);
            exit(0);
        }
    }
    fail("reading from " CONTROL_PORT);
}

static void open_control(void)
{
    struct termios settings;

    control = open(CONTROL_PORT, O_RDWR | O_NOCTTY);
    if (control < 0 || tcgetattr(control, &settings) < 0)
        fail(CONTROL_PORT);
    cfmakeraw(&settings);
    settings.c_cflag |= CLOCAL | CREAD;
    cfsetspeed(&settings, B115200);
    if (tcsetattr(control, TCSAFLUSH, &settings) < 0)
        fail(CONTROL_PORT);
}

int main(void)
{
    const char *mib = getenv("work_mib"), *seed = getenv("work_seed");
    char ready[LONGEST_ANSWER];

    setvbuf(stdout, NULL, _IOLBF, 0);
    errno = EINVAL;
    if (!mib || !strtoull(mib, NULL, 10))
        fail("the kernel's command line has no work_mib");
    open_control();
    fill_memory(seed ? strtoull(seed, NULL, 10) : 1, strtoull(mib, NULL, 10));
    start_workers();
    say_ready(ready);
    puts(ready);
    send_line("", ready);
    answer_commands(fdopen(control, "r"));
}
