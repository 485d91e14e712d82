"""`mdistiller-ext show` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("show", "python tools/show.py")
