"""`mdistiller-ext eval` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("eval", "python tools/eval.py")
