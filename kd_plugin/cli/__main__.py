"""`python -m kd_plugin.cli`, for launchers that want a module."""

from kd_plugin.cli.commands import main

if __name__ == "__main__":
    main()
