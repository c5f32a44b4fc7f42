"""What every page has: one file, its style inside, no script."""

from html import escape

__all__ = ["document"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 56rem;
  margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #d3dae2;
  padding-top: 1.5rem; }
p { max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .75rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e4e9ee; text-align: right;
  white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; }
.scroll { overflow-x: auto; }
img.pixels { image-rendering: pixelated; width: 100%; }
svg { width: 100%; height: auto; }
.pass { color: #2f7a32; font-weight: 600; } .fail { color: #b3261e; font-weight: 600; }
.note { color: #52606d; font-size: .9rem; }
.warning { background: #fff4e0; border-left: 4px solid #d9822b; padding: .6rem .9rem; }
.answers { display: grid; grid-template-columns: repeat(5, 1fr); gap: .8rem; margin: 1rem 0; }
.answers figure { margin: 0; text-align: center; font-size: .85rem; }
.answers img { width: 72px; image-rendering: pixelated; }
"""


def document(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )
