"""`mdistiller-ext export-upstream` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("export_upstream", "python tools/export_upstream.py")
