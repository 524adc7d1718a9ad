// The page: a board laid out as Grafana lays it out, and an account of each panel for the test.

import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { ThemeContext, standardEditorsRegistry, standardFieldConfigEditorRegistry } from '@grafana/data';
import { GlobalStyles } from '@grafana/ui';
import { Shown, input } from './input';
import { BoardPanel, CELL, Outcome, theme } from './panel';
import { allOf } from './query';

// The server registers these options with their editors; for drawing, their names suffice.
const OPTIONS = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'color', 'thresholds', 'mappings'];
const property = (path: string, isCustom: boolean) => ({
  id: isCustom ? `custom.${path}` : path,
  path,
  isCustom,
  name: path,
  process: (value: unknown) => value,
  shouldApply: () => true,
});
const CUSTOM = [
  'drawStyle', 'lineWidth', 'fillOpacity', 'lineInterpolation', 'showPoints', 'pointSize', 'stacking',
  'thresholdsStyle', 'spanNulls', 'axisSoftMin', 'axisSoftMax', 'gradientMode', 'lineStyle',
]; // prettier-ignore
standardEditorsRegistry.setInit(() => []);
standardFieldConfigEditorRegistry.setInit(
  () => [...OPTIONS.map((id) => property(id, false)), ...CUSTOM.map((id) => property(id, true))] as any
);

const outcomes = new Map<number, Outcome>();
const { panels, title, templating } = input.dashboard;

function Board() {
  const [variables, setVariables] = useState<Record<string, string> | null>(null);
  useEffect(() => {
    const list = templating?.list ?? [];
    Promise.all(list.map(async (variable) => [variable.name, await allOf(variable)]))
      .then((pairs) => setVariables(Object.fromEntries(pairs)))
      .catch((problem) => leave([], String(problem)));
  }, []);
  return (
    <main>
      <h2>{title}</h2>
      {variables &&
        panels.map((panel, number) => {
          const left = (panel.gridPos.x * input.width) / 24;
          const top = panel.gridPos.y * (CELL.height + CELL.margin);
          const tell = (outcome: Outcome) => outcomes.set(number, outcome);
          return (
            <div className="place" key={number} id={`panel-${number}`} style={{ left, top }}>
              <BoardPanel panel={panel} variables={variables} tell={tell} />
            </div>
          );
        })}
    </main>
  );
}

/** Where a panel's chart is on the page: left, top, right, bottom in pixels; none: [0, 0, 0, 0]. */
function chart(place: Element): number[] {
  const box = place.querySelector('canvas')?.getBoundingClientRect();
  return box ? [box.left, box.top, box.right, box.bottom].map(Math.round) : [0, 0, 0, 0];
}

function account(): Shown[] {
  return panels.map(({ title, type }, number) => {
    const place = document.getElementById(`panel-${number}`)!;
    const outcome = outcomes.get(number) ?? { series: 0, points: 0, error: 'no answer' };
    return { title, type, ...outcome, text: place.innerText, chart: chart(place) };
  });
}

/** Leaves the account in the page, where the test finds it. */
function leave(shown: Shown[], error: string) {
  const result = document.createElement('script');
  result.type = 'application/json';
  result.id = 'result';
  result.textContent = JSON.stringify({ panels: shown, error }).replace(/</g, '\\u003c');
  document.body.append(result);
}

/** A chart's canvas comes some frames after its data: when its legend has been measured. */
function drawn(): boolean {
  return panels.every(({ type }, number) => {
    const outcome = outcomes.get(number);
    const chart = type === 'timeseries' && outcome?.series;
    return outcome && (!chart || document.querySelector(`#panel-${number} canvas`));
  });
}

const FRAMES = { most: 1800, more: 60 }; // to wait for charts, and for what they have queued

function leaveWhenDrawn(frame: number, since: number) {
  const done = drawn() || frame > FRAMES.most;
  if (done && frame - since > FRAMES.more) {
    leave(account(), '');
  } else {
    requestAnimationFrame(() => leaveWhenDrawn(frame + 1, done ? since : frame));
  }
}

window.addEventListener('error', (event) => {
  if (!event.message.startsWith('ResizeObserver loop')) {
    leave([], event.message);
  }
});
createRoot(document.getElementById('root')!).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <Board />
  </ThemeContext.Provider>
);
leaveWhenDrawn(0, 0);
