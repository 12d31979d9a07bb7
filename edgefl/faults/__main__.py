import sys

from edgefl.errors import MissingExtra

if __name__ == "__main__":
    try:
        from edgefl.faults.cli import main
    except ImportError as cause:
        sys.exit(f"error: {MissingExtra('python -m edgefl.faults', 'dev')} ({cause})")
    main()
