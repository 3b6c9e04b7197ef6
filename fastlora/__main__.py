"""``python -m fastlora``: the ``fastlora`` command."""

from fastlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
