"""The style of pages: light and dark, on paper, and on a screen of 375 pixels."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2127;--soft:#5b6470;--line:#d9dde3;--card:#f5f6f8;
--link:#0b5cad;--good:#0a6b4a;--bad:#a3310a;--s0:#0072b2;--s1:#d55e00;--s2:#00805c;--s3:#b0578d;--s4:#946200}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#a1a9b4;--line:#353b44;
--card:#1d2126;--link:#7db8f5;--good:#5fd0a4;--bad:#ff9d75;--s0:#56b4e9;--s1:#ff9a4d;--s2:#3fc79d;--s3:#e5a3cb;
--s4:#e9b949}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 3rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 .8rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.6rem 0;max-width:48rem}
a{color:var(--link)}
a:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--link);outline-offset:2px}
header p{color:var(--soft);margin:.2rem 0}
nav{margin:1.2rem 0 0;padding:.7rem 0;border-block:1px solid var(--line)}
nav ol{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;list-style:none;margin:0;padding:0;font-size:.92rem}
section{margin-top:2.4rem}
dl.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.8rem;margin:1.2rem 0 0}
dl.numbers>div{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .9rem}
dl.numbers dt{font-size:.82rem;color:var(--soft)}
dl.numbers dd{margin:.1rem 0 0;font-size:1rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
dl.numbers dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft);line-height:1.4}
figure{margin:1.1rem 0;min-width:0}
figcaption,.caption{font-size:.88rem;color:var(--soft);margin-top:.45rem;max-width:48rem}
img{display:block;max-width:100%;height:auto;border-radius:.2rem}
.charts,.pictures{display:grid;gap:0 1.6rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.pictures.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:0 1rem}
.charts>figure{max-width:36rem}
svg{display:block;width:100%;height:auto;font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg text{fill:var(--soft)}
svg .title{fill:var(--ink);font-weight:600}
svg .grid{stroke:var(--line);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .s0{--c:var(--s0)}svg .s1{--c:var(--s1)}svg .s2{--c:var(--s2)}svg .s3{--c:var(--s3)}svg .s4{--c:var(--s4)}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .dashed{stroke-dasharray:6 3}
svg .faint{stroke-width:1;opacity:.4}
svg .error{stroke:var(--c);stroke-width:1.2}
svg .dot{fill:var(--c)}
svg .area{fill:var(--c);opacity:.16}
.table{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:min(100%,20rem)}
caption{text-align:left;color:var(--soft);font-size:.88rem;padding-bottom:.35rem}
th,td{padding:.32rem .9rem .32rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:500;white-space:nowrap}
tbody th{font-weight:500}
.numbers td{white-space:nowrap}
caption span{display:inline-block;position:sticky;left:0;max-width:min(48rem,calc(100vw - 2.5rem))}
.numbers tbody th{position:sticky;left:0;background:var(--paper);overflow-wrap:normal;white-space:nowrap}
.numbers tbody th.long{min-width:11rem;white-space:normal}
.facts th{color:var(--soft);white-space:nowrap;overflow-wrap:normal}
.beside{display:flex;flex-wrap:wrap;gap:0 2.2rem;align-items:flex-start}.beside>*{max-width:100%}
.beside figcaption{contain:inline-size}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{background:var(--card);border-radius:.2rem;padding:.1em .3em}
pre{background:var(--card);border:1px solid var(--line);border-radius:.3rem;padding:.7rem .9rem;margin:.7rem 0;
white-space:pre-wrap;font-size:.86rem}
pre code{background:none;padding:0;font-size:1em}
dl.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:0 1.6rem;font-size:.9rem;
margin:.4rem 0}
dl.settings>div{display:flex;justify-content:space-between;gap:1rem;border-bottom:1px solid var(--line);
padding:.28rem 0}
dl.settings dt{color:var(--soft)}dl.settings dd{margin:0;text-align:right}
.command code::before{content:"$ ";color:var(--soft)}
.note{border-left:3px solid var(--line);padding-left:.8rem}
.missing{border-left:3px solid var(--line);padding-left:.8rem;color:var(--soft)}
.good{border-left:3px solid var(--good);padding-left:.8rem}
.bad{border-left:3px solid var(--bad);padding-left:.8rem;font-weight:600}
ul.notes{margin:.6rem 0;padding-left:1.1rem;font-size:.9rem;color:var(--soft);max-width:48rem}
ul.notes li{margin:.25rem 0}
footer{margin-top:3rem;padding-top:.8rem;border-top:1px solid var(--line);font-size:.88rem;color:var(--soft)}
@media screen and (prefers-color-scheme:dark){img.plot{filter:invert(.9) hue-rotate(180deg)}}
@media (max-width:30rem){body{padding:1.2rem 1rem 2rem}h1{font-size:1.5rem}section{margin-top:2rem}
dl.numbers{grid-template-columns:1fr 1fr;gap:.5rem}dl.numbers>div{padding:.55rem .65rem}dl.numbers dd{font-size:.95rem}
.numbers tbody th.long{min-width:8rem}}
@media print{@page{margin:16mm}body{max-width:none;padding:0;font-size:10.5pt}nav{display:none}
a{color:inherit;text-decoration:none}section{margin-top:1.6rem}figure,tr,.command,dl.numbers>div{break-inside:avoid}
p:has(+pre){break-after:avoid}pre{font-size:7.5pt}
h2,h3,caption{break-after:avoid}.table{overflow:visible}.numbers table{font-size:7.6pt}
.numbers th,.numbers td{padding-right:.7em}.numbers tbody th.long{min-width:7rem}
.charts,.pictures{grid-template-columns:1fr 1fr}.pictures.small{grid-template-columns:1fr 1fr 1fr}
img{max-height:200mm;width:auto}}
"""
