"""`python -m lowpass` is the command `lowpass`."""

from lowpass.cli import main

if __name__ == "__main__":
    main()
