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

/** Pixels with a colour in what a panel drew: grid, axes and text are grey. */
function coloured(place: Element): number {
  let count = 0;
  for (const canvas of place.querySelectorAll('canvas')) {
    const { data } = canvas.getContext('2d')!.getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < data.length; at += 4) {
      const [red, green, blue, alpha] = data.subarray(at, at + 4);
      const spread = Math.max(red, green, blue) - Math.min(red, green, blue);
      count += Number(spread > 40 && alpha > 20);
    }
  }
  return count;
}

function account(): Shown[] {
  return panels.map(({ title, type }, number) => {
    const place = document.getElementById(`panel-${number}`)!;
    const outcome = outcomes.get(number)!;
    return { title, type, ...outcome, text: place.innerText, drawn: coloured(place) };
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

function leaveWhenDrawn() {
  if (outcomes.size < panels.length) {
    setTimeout(leaveWhenDrawn, 100);
  } else {
    setTimeout(() => leave(account(), ''), 1000); // queued drawing
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
leaveWhenDrawn();
