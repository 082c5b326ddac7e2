"""The style sheet of report.html: light, dark, narrow, printed. Next: report_page.py.

The colours of the lines are those of Okabe and Ito, told apart by colour-blind readers too, darkened
or lightened where the background asks for it.
"""

CSS = """
:root {
  --bg: #ffffff; --panel: #f5f6f8; --ink: #1b1e23; --muted: #596270; --rule: #dcdfe4;
  --own: #dcebf7; --warn: #fdf0d5;
  --c0: #0072b2; --c1: #d55e00; --c2: #008a65; --c3: #b85590;
  --c4: #a87400; --c5: #3187c4; --c6: #6b4fa0; --c7: #555b63;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14161a; --panel: #1d2026; --ink: #e7e9ec; --muted: #a0a8b4; --rule: #333842;
    --own: #1d3548; --warn: #42351a;
    --c0: #56b4e9; --c1: #ff8a3d; --c2: #2ec79a; --c3: #e79ac8;
    --c4: #f0b93a; --c5: #8fc7ff; --c6: #b79cf0; --c7: #b4bac3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 6px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
small { font-size: 11.5px; color: var(--muted); font-weight: 400; }
.context, .note { color: var(--muted); margin: 4px 0 14px; overflow-wrap: anywhere; }
.note { font-size: 13px; max-width: 80ch; }
.notice { background: var(--warn); padding: 10px 14px; border-radius: 6px; overflow-wrap: anywhere; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 10px;
  list-style: none; margin: 18px 0 0; padding: 0;
}
.tiles li { background: var(--panel); border-radius: 8px; padding: 11px 13px; overflow-wrap: anywhere; }
.tiles span, .tiles b, .tiles small { display: block; }
.tiles span { font-size: 12.5px; color: var(--muted); }
.tiles b { font-size: 18px; line-height: 1.3; margin: 2px 0; font-variant-numeric: tabular-nums; }
.tiles i { font-style: normal; font-weight: 400; font-size: 12.5px; color: var(--muted); }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
caption { text-align: left; font-size: 13px; color: var(--muted); padding-bottom: 4px; }
th, td { padding: 5px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
thead th { font-size: 12px; color: var(--muted); vertical-align: bottom; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.stages { width: 100%; }
.stages thead .n { white-space: normal; overflow-wrap: break-word; min-width: 64px; }
.stages tr > :first-child { position: sticky; left: 0; background: var(--bg); min-width: 170px; }
.stages small { display: block; line-height: 1.3; }
.stages i { font-style: normal; font-weight: 400; font-size: 11.5px; color: var(--muted); margin-left: 4px; }
.score span { display: inline-block; min-width: 45px; }
.sampled { font-weight: 600; }
.greedy { color: var(--muted); margin-left: 6px; }
.own { background: var(--own); }
.to-do, .none { color: var(--muted); }
.outdated td { text-decoration: line-through; }

.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 20px 36px; }
.pair table { width: 100%; max-width: 440px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.chart { margin: 0; padding: 10px 12px; border: 1px solid var(--rule); border-radius: 8px; break-inside: avoid; }
.chart figcaption { font-weight: 600; font-size: 13.5px; margin-bottom: 4px; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--muted); }
.chart .end { font-weight: 600; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 0.7; }
.axis { fill: none; stroke: var(--muted); stroke-width: 0.8; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0; list-style: none; }
.legend li { font-size: 12px; }
.legend b { font-weight: 400; color: var(--muted); font-variant-numeric: tabular-nums; }
.legend svg { display: inline-block; width: 16px; height: 8px; }
.legend path { fill: none; stroke-width: 2.5; }

.account { font-variant-numeric: tabular-nums; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; font-size: 13px; }
dt { color: var(--ink); }
dd { margin: 0; color: var(--muted); }

@media screen and (max-width: 860px) {
  main { padding: 18px 14px 32px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
  .tiles b { font-size: 16px; }
  .stages thead { display: none; }
  .stages tr {
    display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px;
    padding: 10px 0; border-bottom: 1px solid var(--rule);
  }
  .stages th, .stages td { border: 0; padding: 0; text-align: left; }
  .stages tr > :first-child { grid-column: 1 / -1; position: static; }
  .stages td::before {
    content: attr(data-label); display: block; white-space: normal; overflow-wrap: anywhere;
    font-size: 11px; color: var(--muted);
  }
  .stages .own { padding: 0 6px; border-radius: 4px; margin-left: -6px; }
  .stages .none { display: none; }
  .score span { min-width: 0; }
  .pair th, .pair td { padding: 4px 7px; font-size: 12px; }
}
@media print {
  :root {
    --bg: #ffffff; --panel: #f5f6f8; --ink: #000000; --muted: #444b55; --rule: #c8ccd2;
    --own: #dcebf7; --warn: #fdf0d5;
    --c0: #0072b2; --c1: #d55e00; --c2: #008a65; --c3: #b85590;
    --c4: #a87400; --c5: #3187c4; --c6: #6b4fa0; --c7: #555b63;
  }
  body { font-size: 11px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  .stages tr > :first-child { min-width: 0; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .tiles b { font-size: 14px; }
  small, .stages i { font-size: 8.5px; }
  table, caption, .note, dl { font-size: 10px; }
  th, td { padding: 3px 4px; }
  thead th { font-size: 9px; }
  .score span { min-width: 31px; }
  .greedy { margin-left: 2px; }
  .charts { grid-template-columns: repeat(2, 1fr); }
  tr, .tiles li, .pair .wide { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
