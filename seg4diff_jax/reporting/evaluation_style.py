"""How the page of an evaluation looks."""

from __future__ import annotations

STYLE = """
:root {
  --ink: #1c2127; --faint: #68717c; --line: #e3e6ea; --paper: #fff; --ground: #f5f6f8; --mark: #2b6cb0; --dull: #b9c2cc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ed; --faint: #98a2ad; --line: #30363d; --paper: #1b1f24; --ground: #121519; --mark: #63a4e8;
    --dull: #515b66;
  }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 26px; margin: 0 }
h2 { font-size: 18px; margin: 36px 0 10px }
p { margin: 4px 0 10px }
.faint { color: var(--faint) }
.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap }
.panel {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; overflow-x: auto;
}
.top { display: grid; grid-template-columns: minmax(200px, 1fr) minmax(300px, 3fr); gap: 16px; margin-top: 20px }
@media (max-width: 720px) { .top { grid-template-columns: 1fr } }
.score { font-size: 52px; line-height: 1.1; font-weight: 650; letter-spacing: -1px }

table { border-collapse: collapse; width: 100% }
th { font-weight: 500; color: var(--faint); text-align: left }
th.number { text-align: right }
td, th { padding: 4px 10px; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 }
tr.best td { font-weight: 650 }
td.wide { width: 40% }
.bar { background: var(--dull); height: 12px; border-radius: 3px; min-width: 1px }
.mark { background: var(--mark) }

.classes { columns: 3 300px; column-gap: 28px }
.class {
  display: grid; grid-template-columns: 14px 7em 1fr 6em; gap: 8px; align-items: center; break-inside: avoid;
}
.class .bar { height: 8px }
.class b { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-weight: 400 }
.swatch {
  display: inline-block; width: 14px; height: 14px; border-radius: 3px; border: 1px solid #0003; vertical-align: -2px;
}

.image { margin-bottom: 14px }
.image header { display: flex; justify-content: space-between; margin-bottom: 8px }
.strip { display: flex; gap: 10px; align-items: flex-start }
.heat { display: flex; flex-wrap: wrap; gap: 6px 10px; flex: 1 }
@media (max-width: 900px) { .strip { flex-wrap: wrap } }
figure { margin: 0; width: 98px }
figure.large { width: 176px; flex: none }
figure img { width: 100%; display: block; border-radius: 5px }
figcaption { font-size: 12.5px; color: var(--faint); margin-top: 3px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 10px; font-size: 13.5px }
"""
