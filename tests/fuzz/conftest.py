"""How the targets are handed to another fuzzer.

By default each target gets its `examples`; PAGEFERRY_CHAOS=long gives it fifty times as many. What hypothesis finds it
prints: put that input into the target's seeds, which every run begins with.

A target is called with bytes, and raises only where it has found a hole, so a fuzzer that is guided by coverage takes
it as it is. With atheris, which has no release for the Pythons that CI uses, from this directory:

    import atheris, sys
    with atheris.instrument_imports():
        from targets import TARGETS
    atheris.Setup(sys.argv, TARGETS["pages"])
    atheris.Fuzz()
"""
