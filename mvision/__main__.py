"""``python -m mvision``, which ``torchrun -m mvision train ...`` needs."""

from mvision.cli.main import main

if __name__ == "__main__":
    main()
