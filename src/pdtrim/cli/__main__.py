"""``python -m pdtrim.cli``."""

from pdtrim.cli import main

main()
