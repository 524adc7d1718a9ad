// What the test writes into the page and reads out of it again.

import { FieldConfigSource } from '@grafana/data';

export interface Target {
  expr: string;
  legendFormat?: string;
  refId?: string;
  hide?: boolean;
}

export interface Panel {
  title: string;
  description?: string;
  type: string;
  gridPos: { x: number; y: number; w: number; h: number };
  targets: Target[];
  fieldConfig: FieldConfigSource;
  options: any;
}

export interface Variable {
  name: string;
  type: string;
  query: string | { query: string };
}

/** A dashboard as provisioned, the Prometheus to ask, and the time shown (Unix seconds). */
export interface Input {
  dashboard: { title: string; panels: Panel[]; templating?: { list?: Variable[] } };
  prometheus: string;
  from: number;
  to: number;
  scrapeSeconds: number;
  width: number;
}

/** What became of a panel. error: "" if none; text: what it reads; chart: its corners. */
export interface Shown {
  title: string;
  type: string;
  series: number;
  points: number;
  error: string;
  text: string;
  chart: number[];
}

export const input: Input = JSON.parse(document.getElementById('input')!.textContent!);
