"""`mdistiller-ext export` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("export", "python tools/export.py")
