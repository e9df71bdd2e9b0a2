"""The report's own style, added to nbconvert's: lines of readable length, wide things in boxes that scroll, paper."""

from __future__ import annotations

__all__ = ["CSS", "styled"]

CSS = """
/* Screens: text as wide as one reads; a table or a figure that is wider scrolls inside its own box. */
body.jp-Notebook { box-sizing: border-box; max-width: 62rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
.jp-Cell, .jp-Cell-inputWrapper, .jp-Cell-outputWrapper, .jp-OutputArea, .jp-OutputArea-child,
.jp-InputArea, .jp-OutputArea-output, .jp-MarkdownOutput { min-width: 0; max-width: 100%; }
.jp-RenderedHTMLCommon { overflow-wrap: break-word; }
.jp-RenderedHTMLCommon table {
  display: block; width: fit-content; max-width: 100%; overflow-x: auto; margin: 0.5rem 0;
}
.jp-RenderedHTMLCommon th, .jp-RenderedHTMLCommon td { text-align: left; vertical-align: top; white-space: normal; }
.jp-RenderedHTMLCommon td[style*="right"], .jp-RenderedHTMLCommon td strong { white-space: nowrap; }
.jp-RenderedHTMLCommon td { min-width: 3rem; }
.jp-RenderedHTMLCommon td:last-child code { overflow-wrap: anywhere; }
.jp-RenderedImage, .jp-RenderedHTML { overflow-x: auto; }
.jp-RenderedImage img, .jp-RenderedHTML img { max-width: 100%; height: auto; }
.jp-RenderedText pre { overflow-x: auto; }

@media screen and (max-width: 700px) {
  body.jp-Notebook { padding: 0.5rem 0.25rem 3rem; }
  .jp-Cell { padding: 2px 4px; }
  .jp-RenderedHTMLCommon h1 { font-size: 1.6rem; }
  .jp-RenderedHTMLCommon ul, .jp-RenderedHTMLCommon ol { padding-left: 1.2rem; }
  /* Labels of a figure shrunk to a phone cannot be read. */
  .jp-RenderedImage img, .jp-RenderedHTML img { width: 640px; max-width: none; }
  /* Sentences in a table need room; numbers do not. */
  .jp-RenderedHTMLCommon td:not([style*="right"]):nth-child(n+4) { min-width: 14rem; }
}

@media print {
  @page { size: A4; margin: 18mm 16mm; }
  body.jp-Notebook { max-width: none; padding: 0; font-size: 10pt; background: white; color: black; }
  .jp-Cell { padding: 0; break-inside: auto; }
  .jp-RenderedHTMLCommon table { display: table; width: auto; font-size: 8pt; overflow: visible; }
  .jp-RenderedHTMLCommon thead { display: table-header-group; }
  .jp-RenderedHTMLCommon td { min-width: 0; padding: 2px 4px; }
  .jp-RenderedHTMLCommon tr, .jp-RenderedImage, .jp-RenderedHTML p { break-inside: avoid; }
  .jp-RenderedImage, .jp-RenderedHTML, .jp-RenderedText pre { overflow: visible; white-space: pre-wrap; }
  .jp-RenderedImage img, .jp-RenderedHTML img { max-width: 100%; max-height: 230mm; object-fit: contain; }
  h1, h2, h3 { break-after: avoid; }
  p, li { orphans: 3; widows: 3; }
  a { color: black; }
}
"""


def styled(html: str) -> str:
    """An exported page with the report's style, which comes last and so wins.

    Args:
        html: a whole page.
    """
    head, end, rest = html.partition("</head>")
    return f"{head}<style>{CSS}</style>\n{end}{rest}" if end else html
