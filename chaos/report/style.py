"""The look of the report, in light and in dark."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1d2327;--dim:#667078;--line:#e4e6e3;--lane:#f3f4f1;
--fault:#e5484d;--leads:#7c66dc;--claim:#3b7dd8;--effect:#1f9d63;--suspect:#d98a00;--resolved:#1f9d63;
--good:#15803d;--bad:#c62828;--warn:#b45309}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1b1f23;--ink:#e6e8ea;--dim:#98a2ab;--line:#2c3238;
--lane:#22272c;--fault:#f2686c;--leads:#a594f9;--claim:#6aa9f7;--effect:#4cc38a;--suspect:#f0b13c;--resolved:#4cc38a;
--good:#4cc38a;--bad:#f2686c;--warn:#f0b13c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 24px 48px}
header{display:flex;align-items:center;gap:14px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em}
h2{font-size:15px;margin:0 0 8px}
.lead{margin:6px 0 20px;color:var(--dim)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 20px;margin:0 0 16px;
overflow-x:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.figures div{display:flex;flex-direction:column}
.figures b{font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums;font-weight:600}
.figures span,.dim,footer{color:var(--dim);font-size:13px}
.badge{display:inline-block;padding:1px 9px;border-radius:99px;font-size:12.5px;font-weight:600;
border:1px solid currentColor;white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 6px;color:var(--dim);font-size:13px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.key{width:14px;height:10px;border-radius:2px;display:inline-block;background:currentColor}
.key.fault{background:var(--fault);opacity:.3}.key.leads{background:var(--leads)}
.key.claim,.key.submits{background:var(--claim)}.key.effect,.key.effects,.key.median{background:var(--effect)}
.key.slowest{background:var(--suspect)}
.key.suspect,.key.resolved{width:9px;height:9px;transform:rotate(45deg)}
.key.suspect{background:var(--suspect)}.key.resolved{background:var(--resolved)}
svg{display:block;width:100%;min-width:760px;height:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
svg .tick{fill:var(--dim);font-size:11px}svg .name{font-weight:600}
svg .said{fill:var(--fault);font-size:11px;font-weight:600}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--dim);stroke-width:1}
svg .lane{fill:var(--lane)}
svg .fault{fill:var(--fault);fill-opacity:.17}
svg .leads{fill:var(--leads)}
svg .doubt{fill:var(--suspect);fill-opacity:.6}
svg .suspect{fill:var(--suspect)}svg .resolved{fill:var(--resolved)}
svg path{stroke-width:1.6;fill:none}
svg .claim{stroke:var(--claim)}svg .effect{stroke:var(--effect)}
svg .few{stroke-opacity:.45}svg .some{stroke-opacity:.75}svg .many{stroke-opacity:1}
svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .slowest{stroke-width:4;stroke-opacity:.5}
svg .submits{stroke:var(--claim)}svg .effects,svg .median{stroke:var(--effect)}svg .slowest{stroke:var(--suspect)}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{text-align:left;padding:6px 12px 6px 0;border-top:1px solid var(--line);vertical-align:top}
tr:first-child td,tr:first-child th{border-top:0}
th{color:var(--dim);font-weight:500;font-size:13px}
.num{text-align:right;font-variant-numeric:tabular-nums;padding-right:18px;width:1%;white-space:nowrap}
td:last-child{white-space:nowrap}td:last-child:has(.badge){text-align:right;width:1%;padding-right:0}
ul{margin:4px 0 0;padding-left:18px}
footer{margin-top:24px}
"""
