// A run in training, from the files that it writes, asked for again every two seconds.

import { html } from "htm/preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { get, request } from "./api.js";
import { Chart } from "./chart.js";
import { Command, counted, format } from "./widgets.js";

const LIVE_MS = 2000;
const CURVES = [
  ["loss", "training loss"],
  ["bits_per_dim", "held out, bits/dim"],
  ["accuracy", "held-out accuracy"],
  ["lr", "learning rate"],
  ["items_per_second", "items per second"],
];

export function Training({ index, active }) {
  const [state, setState] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    if (!active) return undefined;
    let timer;
    let stopped = false;
    async function look() {
      try {
        const found = await get(`/api/runs/${index}/training`);
        if (stopped) return;
        setState(found);
        setError("");
        if (found.state === "training") timer = setTimeout(look, LIVE_MS);
        else timer = setTimeout(look, 5 * LIVE_MS);
      } catch (problem) {
        if (!stopped) setError(problem.message);
      }
    }
    look();
    return () => {
      stopped = true;
      clearTimeout(timer);
    };
  }, [active, index]);

  if (error) return html`<p role="alert" class="error">${error}</p>`;
  if (!state) return html`<p>Loading …</p>`;
  const last = state.records.at(-1);
  const steps = state.max_steps ? ` of ${state.max_steps.toLocaleString("en")}` : "";
  const minutes = state.minutes ? ` of ${counted(state.minutes, "minute")}` : "";
  const final = state.records.findLast((record) => record.final_bits_per_dim != null);
  return html`<div>
    <p class="result" role="status" aria-live="polite"><strong>${state.state}</strong> on ${state.data}</p>
    <p>${last ? `step ${last.step.toLocaleString("en")}${steps} after ${duration(last.seconds ?? 0)}${minutes}` : "no record yet"}${
      final ? ` · final bound ${format(final.final_bits_per_dim)}${final.final_stderr == null ? "" : ` ± ${format(final.final_stderr)}`} bits per dimension` : ""}</p>
    <div class="charts">
      ${CURVES.map(([key, name]) => html`<${Curve} key=${key} records=${state.records} name=${name} field=${key} />`)}
    </div>
    ${state.pictures.length > 0 && html`<${Pictures} index=${index} names=${state.pictures} step=${last?.step} />`}
    <${Command} text=${state.command} name="watch" />
  </div>`;
}

const duration = (seconds) => (
  seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${(seconds / 3600).toFixed(1)} hours`
);

function Curve({ records, name, field }) {
  const data = useMemo(() => {
    const rows = records.filter((record) => record[field] != null);
    return [rows.map((record) => record.step), rows.map((record) => record[field])];
  }, [records, field]);
  if (!data[0].length) return null;
  return html`<section class="card" aria-label=${name}>
    <h2>${name}</h2>
    <${Chart} data=${data} series=${[{ label: name, colour: "--accent" }]} xLabel="step" yLabel=""
      summary=${`${name}: ${data[1].at(-1).toPrecision(4)} at step ${data[0].at(-1)}`} />
  </section>`;
}

function Pictures({ index, names, step }) {
  const [chosen, setChosen] = useState(null);
  const [address, setAddress] = useState("");
  const name = chosen ?? names.findLast((one) => one.startsWith("samples")) ?? names.at(-1);
  useEffect(() => {
    let made = "";
    let stopped = false;
    request(`/api/runs/${index}/pictures/${names.indexOf(name)}`).then((answer) => answer.blob()).then((blob) => {
      if (stopped) return;
      made = URL.createObjectURL(blob);
      setAddress(made);
    }, () => {});
    return () => {
      stopped = true;
      URL.revokeObjectURL(made);
    };
  }, [index, name, step]);
  return html`<section class="card" aria-label="Pictures of the training">
    <label class="field"><span>Picture</span>
      <select value=${name} onChange=${(e) => setChosen(e.target.value)}>
        ${names.map((one) => html`<option value=${one} selected=${one === name}>${one}</option>`)}
      </select>
    </label>
    ${address && html`<img class="picture" src=${address} alt=${`${name}, written by the training`} />`}
  </section>`;
}
