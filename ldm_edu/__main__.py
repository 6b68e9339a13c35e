"""`python -m ldm_edu`: the command `ldm-edu`, where the folder of commands is not on the PATH."""

from ldm_edu.cli import main

if __name__ == "__main__":
    main(prog_name="ldm-edu")
