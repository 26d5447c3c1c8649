"""A small document model and its two forms: Markdown, and one self-contained HTML page."""

import base64
import dataclasses
import html
import re
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from mpt_jax.studies import figures


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown and, for sorting, the number behind it; `weak` ones are printed softly.

    The page shows `detail`, plain text, when the cell is clicked at.
    """

    text: str
    value: float | None = None
    best: bool = False
    weak: bool = False
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """One paragraph, or with several `lines` a list. `code` marks are the only markup."""

    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under their columns' names; `folded` hides it behind its caption, and leaves it out of Markdown."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, its file name without ending, and the caption that also says how to read it."""

    name: str
    figure: Figure
    caption: str


Block = Heading | Text | Table | Picture


def to_markdown(title: str, blocks: Sequence[Block], picture_folder: str) -> str:
    """The document in Markdown, its pictures taken from `picture_folder`/NAME.png."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(lines):
                parts.append(lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines))
            case Picture(name, _, caption):
                parts.append(f"![{_alt(name)}]({picture_folder}/{name}.png)\n\n*{caption}*")
            case Table(caption, _, _, True):
                parts.append(f"*{caption}; the HTML page lists them.*")
            case Table():
                parts.append(_markdown_table(block))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one page: styles, script and pictures inside, nothing loaded from anywhere."""
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n<h1>{html.escape(title)}</h1>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _markdown_table(table: Table) -> str:
    def row(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    right = [any(cells[i].value is not None for cells in table.rows) for i in range(len(table.columns))]
    lines = [row(table.columns), "|" + "|".join(" ---: " if number else " --- " for number in right) + "|"]
    lines += [row(f"**{cell.text}**" if cell.best else cell.text for cell in cells) for cells in table.rows]
    return f"*{table.caption}*\n\n" + "\n".join(lines)


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(lines):
            items = [re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(line)) for line in lines]
            return f"<p>{items[0]}</p>" if len(items) == 1 else "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
        case Picture(name, figure, caption):
            source = base64.b64encode(figures.to_svg(figure).encode()).decode()
            text, width = html.escape(caption), round(figure.get_figwidth() * figures.PAGE_PIXELS)
            return (
                f'<figure><img alt="{_alt(name)}" style="width:{width}px;min-width:min({width}px,600px)" '
                f'src="data:image/svg+xml;base64,{source}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
        case Table(caption, _, _, True):
            return f"<details><summary>{html.escape(caption)}</summary>{_html_table(block)}</details>"
        case Table(caption):
            return f'<p class="caption">{html.escape(caption)}</p>{_html_table(block)}'


def _alt(name: str) -> str:
    """What a picture is, in two or three words; its caption, which follows, says the rest."""
    return name.replace("_", " ")


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in table.columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(table.caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>"
        + "".join("<tr>" + "".join(map(_html_cell, cells)) + "</tr>" for cells in table.rows)
        + "</tbody></table></div>"
    )


def _html_cell(cell: Cell) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value:.6g}"'
    kinds = ["number"] * (cell.value is not None) + ["weak"] * cell.weak
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    text = html.escape(cell.text)
    if cell.detail:
        text = f"<details><summary>{text}</summary><pre>{html.escape(cell.detail)}</pre></details>"
    return f"<td{kind}{value}>{f'<b>{text}</b>' if cell.best else text}</td>"


STYLE = """
:root{color-scheme:light dark;--ink:#1c2126;--soft:#5b6570;--rule:#dde1e5;--back:#fbfbfa;--band:#f1f3f4;--link:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#a2abb4;--rule:#3a4148;--back:#16191c;--band:#202529;--link:#66b7e8}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 72px}
h1{font-size:27px;line-height:1.25;margin:0 0 6px}
h2{font-size:18px;margin:40px 0 8px;padding-top:14px;border-top:1px solid var(--rule)}
p,ul{max-width:86ch}li{margin:3px 0}
code{font:12.5px ui-monospace,"DejaVu Sans Mono",monospace;
  background:var(--band);padding:1px 4px;border-radius:3px;overflow-wrap:anywhere}
figure{margin:18px 0;padding:14px 16px 10px;background:#fff;border:1px solid var(--rule);border-radius:6px;overflow-x:auto}
figure img{display:block;max-width:100%;height:auto;margin:0 auto}
figcaption{color:#4c555e;font-size:13px;margin:10px 0 0;max-width:100ch}
.caption{color:var(--soft);font-size:13px;margin:18px 0 6px;max-width:none}
.scroll{overflow-x:auto}.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 11px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--rule)}
td.number{text-align:right}td.weak{color:var(--soft)}
th{position:sticky;top:0;background:var(--back);border-bottom:2px solid var(--soft)}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--link)}
th button::after{content:"\\2195";color:var(--soft);font-size:10px;margin-left:5px;opacity:.6}
th[aria-sort=ascending] button::after{content:"\\25B2";opacity:1}
th[aria-sort=descending] button::after{content:"\\25BC";opacity:1}
tbody tr:hover{background:var(--band)}
details{margin:14px 0}td details{margin:0}td{vertical-align:top}
pre{font:12px/1.4 ui-monospace,"DejaVu Sans Mono",monospace;margin:4px 0}
summary{cursor:pointer;color:var(--link)}
@media(max-width:640px){main{padding:20px 12px 48px}h1{font-size:22px}th,td{padding:4px 7px}ul{padding-left:20px}}
@media print{figure,tr{break-inside:avoid}}
"""

SCRIPT = """
document.querySelectorAll('th button').forEach(function(button){button.addEventListener('click',function(){
  var head=button.parentNode,row=head.parentNode,body=row.parentNode.parentNode.tBodies[0];
  var column=Array.prototype.indexOf.call(row.cells,head),down=head.getAttribute('aria-sort')!=='descending';
  if(!head.hasAttribute('aria-sort')&&!body.querySelector('td:nth-child('+(column+1)+')[data-value]'))down=false;
  Array.prototype.forEach.call(row.cells,function(cell){cell.removeAttribute('aria-sort')});
  head.setAttribute('aria-sort',down?'descending':'ascending');
  function key(line){var cell=line.cells[column],value=cell.getAttribute('data-value');
    return value===null?[1,cell.textContent]:[0,parseFloat(value)]}
  Array.from(body.rows).sort(function(a,b){var x=key(a),y=key(b);
    if(x[0]!==y[0])return x[0]-y[0];
    var order=x[0]?x[1].localeCompare(y[1]):x[1]-y[1];return down?-order:order}).forEach(function(line){body.appendChild(line)});
})});
"""
