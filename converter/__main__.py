"""``python -m converter`` is the ``convert`` command."""

from converter.cli import main

if __name__ == "__main__":
    main()
