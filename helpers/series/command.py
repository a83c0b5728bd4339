"""The console command `seven-plan`, started before anything large is imported."""

import gc


def main() -> int:
    """`advice.main`, in a process that looks for no garbage.

    Most of its seconds are imports, which leave none; a quarter of them went into looking for it.
    """
    gc.disable()
    from helpers.series import advice

    return advice.main()
