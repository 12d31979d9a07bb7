from edgefl.app.cli import main

if __name__ == "__main__":
    main()
