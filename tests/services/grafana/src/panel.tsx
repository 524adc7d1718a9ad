// One panel, drawn by Grafana's components: PanelChrome around TimeSeries (uPlot) or BigValue.
// The panel plugins that join them are part of the server; this does what they do, for two types.

import { Component, ReactNode, useEffect, useState } from 'react';
import {
  DataFrame,
  FieldConfigSource,
  applyFieldOverrides,
  createTheme,
  getFieldDisplayValues,
  getValueFormats,
} from '@grafana/data';
import { BigValue, PanelChrome, TimeSeries, VizRepeater } from '@grafana/ui';
import { VizOrientation } from '@grafana/schema';
import { Panel, input } from './input';
import { framesOf, timeRange } from './query';

export const theme = createTheme({ colors: { mode: 'dark' } });
export const CELL = { height: 30, margin: 8 }; // of Grafana's grid, pixels
const TIME_ZONE = 'utc';
const LINES = { drawStyle: 'line', lineInterpolation: 'linear', showPoints: 'auto', pointSize: 5 };
const UNITS = new Set(getValueFormats().flatMap((group) => group.submenu.map((unit) => unit.value)));
const same = (text: string) => text;

export interface Outcome {
  series: number;
  points: number;
  error: string;
}

function configOf(panel: Panel): FieldConfigSource {
  const { defaults, overrides } = panel.fieldConfig;
  const unit = defaults.unit ?? '';
  if (!UNITS.has(unit) && !unit.startsWith('suffix:')) {
    throw new Error(`Grafana has no unit ${unit}`);
  }
  const lines = panel.type === 'timeseries';
  const custom = lines ? { ...LINES, ...defaults.custom } : undefined;
  const color = defaults.color ?? { mode: lines ? 'palette-classic' : 'thresholds' };
  return { defaults: { ...defaults, color, custom }, overrides: overrides ?? [] };
}

function Numbers({ frames, panel, width, height }: any) {
  const values = () =>
    getFieldDisplayValues({
      data: frames,
      fieldConfig: configOf(panel),
      reduceOptions: panel.options.reduceOptions,
      replaceVariables: same,
      sparkline: panel.options.graphMode !== 'none',
      theme,
      timeZone: TIME_ZONE,
    });
  const draw = ({ value, width, height }: any) => (
    <BigValue
      theme={theme}
      width={width}
      height={height}
      value={value.display}
      sparkline={value.sparkline}
      colorMode={panel.options.colorMode}
      graphMode={panel.options.graphMode}
      textMode={panel.options.textMode}
    />
  );
  const sizes = { width, height, orientation: VizOrientation.Auto, autoGrid: true };
  return <VizRepeater {...sizes} source={frames} getValues={values} renderValue={draw} />;
}

function Drawing({ frames, panel, width, height }: any) {
  if (!frames.length) {
    return <div className="empty">No data</div>;
  }
  if (panel.type === 'stat') {
    return <Numbers frames={frames} panel={panel} width={width} height={height} />;
  }
  if (panel.type !== 'timeseries') {
    throw new Error(`no component here for a panel of type ${panel.type}`);
  }
  const range = { timeRange, timeZone: TIME_ZONE };
  const { legend } = panel.options;
  return <TimeSeries frames={frames} legend={legend} width={width} height={height} {...range} />;
}

/** Catches what a component throws while it draws. */
class Caught extends Component<{ tell: (error: string) => void; children: ReactNode }> {
  state = { error: '' };

  static getDerivedStateFromError(error: unknown) {
    return { error: String(error) };
  }

  componentDidCatch(error: unknown) {
    this.props.tell(String(error));
  }

  render() {
    return this.state.error ? <div className="error">{this.state.error}</div> : this.props.children;
  }
}

function finite(frames: DataFrame[]): number {
  return frames.flatMap((frame) => frame.fields[1].values).filter(Number.isFinite).length;
}

interface Props {
  panel: Panel;
  variables: Record<string, string>;
  tell: (outcome: Outcome) => void;
}

export function BoardPanel({ panel, variables, tell }: Props) {
  const [frames, setFrames] = useState<DataFrame[] | null>(null);
  const [error, setError] = useState('');
  const fail = (text: string) => {
    setError(text);
    tell({ series: 0, points: 0, error: text });
  };
  useEffect(() => {
    framesOf(panel, variables)
      .then((data) => {
        const fieldConfig = configOf(panel);
        const made = { data, fieldConfig, replaceVariables: same, theme, timeZone: TIME_ZONE };
        setFrames(applyFieldOverrides(made));
        tell({ series: data.length, points: finite(data), error: '' });
      })
      .catch((problem) => fail(String(problem)));
  }, []);
  const { w, h } = panel.gridPos;
  const size = {
    width: (w * input.width) / 24 - CELL.margin,
    height: h * (CELL.height + CELL.margin) - CELL.margin,
  };
  return (
    <PanelChrome title={panel.title} statusMessage={error || undefined} {...size}>
      {(width, height) =>
        error ? (
          <div className="error">{error}</div>
        ) : frames ? (
          <Caught tell={fail}>
            <Drawing frames={frames} panel={panel} width={width} height={height} />
          </Caught>
        ) : null
      }
    </PanelChrome>
  );
}
