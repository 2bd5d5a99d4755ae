"""``python -m digit`` is the ``digit`` command."""

from digit.cli.app import main

if __name__ == "__main__":
    main()
