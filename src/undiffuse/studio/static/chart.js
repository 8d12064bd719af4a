// Line charts by uPlot in the colours of the page.

import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";

const HEIGHT = 220;

// data: [x values, y values, ...]; series: [{label, colour}] for each y. summary: what a screen reader says.
export function Chart({ data, series, xLabel, yLabel, summary, stepped = false }) {
  const place = useRef(null);
  const plot = useRef(null);
  const dark = useRef(matchMedia("(prefers-color-scheme: dark)"));

  function build() {
    plot.current?.destroy();
    const style = getComputedStyle(place.current);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = (label) => ({
      label, stroke: colour("--ink-soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") },
      values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : String(Number(tick.toPrecision(4))))),
      font: "12px system-ui", labelFont: "12px system-ui", size: 54, labelSize: 20,
    });
    const paths = stepped ? uPlot.paths.stepped({ align: 1 }) : undefined;
    plot.current = new uPlot({
      width: place.current.clientWidth, height: HEIGHT, cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false } }, legend: { live: true }, axes: [{ ...axis(xLabel), size: 34 }, axis(yLabel)],
      series: [{ label: xLabel, value: (_, v) => (v == null ? "–" : v.toPrecision(4)) }, ...series.map((one) => ({
        label: one.label, stroke: colour(one.colour), width: 2, paths, points: { show: data[0].length < 2 },
        fill: stepped ? colour("--accent-fill") : undefined, value: (_, v) => (v == null ? "–" : v.toPrecision(4)),
      }))],
    }, data, place.current);
  }
  useEffect(() => {
    const observer = new ResizeObserver(() => {
      if (place.current.clientWidth) plot.current?.setSize({ width: place.current.clientWidth, height: HEIGHT });
    });
    observer.observe(place.current);
    dark.current.addEventListener("change", build);
    return () => {
      observer.disconnect();
      dark.current.removeEventListener("change", build);
      plot.current?.destroy();
    };
  }, []);
  useEffect(() => {
    if (!plot.current) build();
    else plot.current.setData(data);
  }, [data]);
  return html`<div class="chart" role="img" aria-label=${summary} ref=${place}></div>`;
}
