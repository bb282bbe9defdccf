"""`python -m nbhelpers` is `nbhelpers`."""

from nbhelpers.cli import main

if __name__ == "__main__":
    main()
