// A panel's queries as Grafana's Prometheus data source puts them, and the answers as its frames.
// The data source itself is part of the server and not on npm.

import { DataFrame, FieldType, dateTime, rangeUtil, toDataFrame } from '@grafana/data';
import { Panel, Target, Variable, input } from './input';

type Labels = Record<string, string>;

export const timeRange = {
  from: dateTime(input.from * 1000),
  to: dateTime(input.to * 1000),
  raw: { from: dateTime(input.from * 1000), to: dateTime(input.to * 1000) },
};

async function ask(path: string, query: Record<string, string>): Promise<any> {
  const url = `${input.prometheus}/api/v1/${path}?${new URLSearchParams(query)}`;
  const answer = await (await fetch(url)).json();
  if (answer.status !== 'success') {
    throw new Error(`${answer.errorType}: ${answer.error}`);
  }
  return answer.data;
}

/** Values of a variable with "All" chosen, as the regular expression that Grafana puts in. */
export async function allOf(variable: Variable): Promise<string> {
  const query = typeof variable.query === 'string' ? variable.query : variable.query.query;
  const found = /^label_values\((.+),\s*(\w+)\)$/.exec(query);
  if (variable.type !== 'query' || !found) {
    throw new Error(`variable ${variable.name}: ${query} is not label_values(metric, label)`);
  }
  const [, metric, label] = found;
  const bounds = { start: `${input.from}`, end: `${input.to}` };
  const values: string[] = await ask(`label/${label}/values`, { 'match[]': metric, ...bounds });
  return `(${values.map((value) => value.replace(/[\\^$*+?.()|[\]{}]/g, '\\\\$&')).join('|')})`;
}

function filledIn(text: string, variables: Labels, step: number): string {
  const rate = Math.max(step + input.scrapeSeconds, 4 * input.scrapeSeconds);
  const all: Labels = {
    ...variables,
    __rate_interval: `${rate}s`,
    __interval: `${step}s`,
    __range: `${input.to - input.from}s`,
  };
  const known = new Set(Object.keys(all));
  return text.replace(/\$\{?(\w+)\}?/g, (whole, name) => {
    if (!known.has(name)) {
      throw new Error(`no variable ${whole}`);
    }
    return all[name];
  });
}

function legend(format: string | undefined, labels: Labels): string {
  if (!format || format === '__auto') {
    return JSON.stringify(labels);
  }
  return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? '');
}

/** A series with null at every step without a value, so that charts show gaps as gaps. */
function frame(target: Target, series: any, start: number, step: number): DataFrame {
  const name = legend(target.legendFormat, series.metric);
  const found = new Map<number, number>(
    series.values.map(([time, value]: [number, string]) => [time, parseFloat(value)])
  );
  const steps = Math.floor((input.to - start) / step) + 1;
  const times = Array.from({ length: steps }, (_, number) => start + number * step);
  return toDataFrame({
    refId: target.refId,
    name,
    fields: [
      { name: 'Time', type: FieldType.time, values: times.map((time) => time * 1000), config: {} },
      {
        name: 'Value',
        type: FieldType.number,
        labels: series.metric,
        values: times.map((time) => found.get(time) ?? null),
        config: { displayNameFromDS: name },
      },
    ],
  });
}

/** Frames of a panel, one per series. Throws if Prometheus refuses a query. */
export async function framesOf(panel: Panel, variables: Labels): Promise<DataFrame[]> {
  const pixels = Math.round((panel.gridPos.w / 24) * input.width);
  const interval = rangeUtil.calculateInterval(timeRange, pixels, `${input.scrapeSeconds}s`);
  const step = interval.intervalMs / 1000;
  const refIds = panel.targets.map((target) => target.refId);
  if (new Set(refIds).size !== refIds.length || refIds.some((id) => !id)) {
    throw new Error(`queries need names of their own, found ${JSON.stringify(refIds)}`);
  }
  const frames: DataFrame[] = [];
  const start = Math.floor(input.from / step) * step;
  for (const target of panel.targets) {
    const query = filledIn(target.expr, variables, step);
    const bounds = { start: `${start}`, end: `${input.to}`, step: `${step}` };
    const answer = await ask('query_range', { query, ...bounds });
    frames.push(...answer.result.map((series: any) => frame(target, series, start, step)));
  }
  return frames;
}
