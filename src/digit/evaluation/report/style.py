"""The page's style sheet: light and dark by the reader's setting, one column on a phone, white on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --bg: #ffffff; --here: #ffffff; --fg: #1b2130; --soft: #586174; --line: #dde1e9; --card: #f6f7f9; --ours: #eaf2ff;
  --notice: #fff5d9; --notice-line: #d9a520;
  --c0: #7c8494; --c1: #1f6feb; --c2: #c4500a; --c3: #1a8f6a; --c4: #8a4fd0; --c5: #b0306a; --c6: #8a7412;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --bg: #12151b; --here: #12151b; --fg: #e4e8ef; --soft: #9aa4b5; --line: #2f3643; --card: #1a1f28; --ours: #16273f;
    --notice: #352c12; --notice-line: #c9981f;
    --c0: #9099a8; --c1: #6ea8ff; --c2: #ff9a5c; --c3: #4fd1a5; --c4: #c29bff; --c5: #ff86b5; --c6: #d9c14e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .2rem; }
h4 { margin: 1rem 0 .3rem; }
p { margin: .4rem 0; }
a { color: var(--c1); }
.place, .small, .notes, figcaption, .legend, dl { font-size: .875rem; }
.place, .small, .notes { color: var(--soft); }
.notes ul { margin: .4rem 0; padding-left: 1.2rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: .8rem 0; list-style: none; }
nav a { display: inline-block; padding: .35rem 0; }
.card { --here: var(--card); background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding:
1rem; margin: 1rem 0; } .notice { background: var(--notice); border-left: .3rem solid var(--notice-line); padding: .4rem
.9rem; margin: .8rem 0; } .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
gap: .8rem 1.4rem; margin: .6rem 0; } .scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible { outline: 2px solid var(--c1); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal;
min-width: 100%; } th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
vertical-align: top; white-space: nowrap; } td { max-width: 26rem; overflow-wrap: anywhere; }
td.text { white-space: normal; min-width: 11rem; }
th.text, td.text { text-align: left; }
th:first-child { text-align: left; white-space: normal; min-width: 7.5rem; max-width: 22rem; overflow-wrap: break-word;
} thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem; }
tbody th { font-weight: 500; }
tbody th[scope=row], thead th:first-child { position: sticky; left: 0; background: var(--here); }
tbody th.group { color: var(--soft); font-weight: 600; padding-top: .8rem; max-width: none; }
.group span { position: sticky; left: .6rem; }
.ours { --here: var(--ours); }
.ours tr > * { background: var(--here); }
td small { color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(7rem, 15rem) 1fr; gap: .1rem 1rem; margin: .4rem 0; }
dt { color: var(--soft); }
dd { margin: 0; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; color: var(--c1); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
.plot { max-width: 34rem; }
svg { display: block; width: 100%; height: auto; color: var(--fg); }
svg text { fill: currentColor; font-size: 11px; font-family: inherit; }
svg .tick, svg .label { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.band { opacity: .18; stroke: none; }
.bubble { stroke: var(--bg); stroke-width: 1; fill-opacity: .75; }
svg .ring { fill: none; stroke-width: 1.5; stroke-dasharray: 2 2; }
svg .dashed { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1rem; list-style: none; margin: .2rem 0 0; padding: 0; color:
var(--soft); } .key { display: inline-block; width: 1.5em; height: 0; border-top: 3px solid; vertical-align: middle;
margin-right: .4em; } .key.dashed { border-top-style: dashed; }
.picture { margin: .8rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: .25rem; }
img.wide { max-width: none; width: 100%; min-width: 44rem; }
img.pixelated { image-rendering: pixelated; width: min(100%, 24rem); }
footer { margin: 3rem 0 1rem; color: var(--soft); font-size: .875rem; border-top: 1px solid var(--line); }
@media (max-width: 32rem) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .3rem; }
  .card { padding: .7rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .card { --here: transparent; background: none; }
  .plot, .picture, tr, .notice { break-inside: avoid; }
  h2, h3, summary { break-after: avoid; }
  .scroll, .picture { overflow: visible; }
  img.wide { min-width: 0; }
  table { font-size: 7.5pt; }
  th, td, th:first-child, td.text { padding: .15rem .3rem; white-space: normal; min-width: 0; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""" + "".join(
    f"svg .line.c{i} {{ stroke: var(--c{i}); }} svg .dot.c{i}, svg .band.c{i}, svg .bubble.c{i} {{ fill: var(--c{i}); }} "
    f"svg .ring.c{i} {{ fill: none; stroke: var(--c{i}); }} .key.c{i} {{ border-color: var(--c{i}); }}\n"
    for i in range(7)
)
