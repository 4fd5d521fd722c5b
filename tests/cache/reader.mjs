// Reads one label of a cache by docs/reference/cache-format.md, without any of our code.
// node reader.mjs CACHE ROW TEMPERATURE prints it as JSON; needs the npm package zarrita.
import FileSystemStore from "@zarrita/storage/fs";
import * as zarr from "zarrita";

const [path, row, temperature] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const root = await zarr.open.v3(zarr.root(new FileSystemStore(path)), { kind: "group" });
const { label, format_version } = root.attrs.logitcask;
if (format_version !== 4 && format_version !== 5) throw new Error(`format ${format_version} is not known`);

const open = (name) => zarr.open.v3(root.resolve(name), { kind: "array" });
const entry = async (name) => {
  const array = await open(name);
  const { data } = await zarr.get(array, array.shape.length > 1 ? [zarr.slice(row, row + 1), null] : [zarr.slice(row, row + 1)]);
  return data;
};
const sums = (differences) => { // running sums, in the type of the differences
  const out = differences.slice();
  for (let i = 1; i < out.length; i++) out[i] += out[i - 1];
  return out;
};
const l = (code) => (code === 65535 ? -Infinity : -code / 8);
const log1p_exp = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

const head_ids = label.head_size ? await entry("head_ids") : [];
const head_l = label.head_size ? Array.from(sums(await entry("head_logprobs")), l) : [];
const last = head_l.length && head_l.at(-1) > -Infinity ? head_l.at(-1) : 0;
let tail_ids = [], tail_l = [], tail_counts = [];
if (label.tail_draws) {
  const counts = await entry("tail_counts");
  const used = [...counts.keys()].filter((i) => counts[i] > 0);
  const [ids, codes] = [sums(await entry("tail_ids")), await entry("tail_logprobs")];
  tail_ids = used.map((i) => ids[i]);
  tail_l = used.map((i) => last - 2 * Math.expm1(codes[i] / 4));
  tail_counts = used.map((i) => counts[i]);
}
let odds = [], log_partition;
if (label.head_size) {
  odds = Array.from(sums(await entry("log_tail_odds")), (code) => (code === -32768 ? -Infinity : code / 8));
  log_partition = label.temperatures.map(
    (t, j) => Math.log(head_l.reduce((sum, x) => sum + Math.exp(x / t), 0)) + log1p_exp(odds[j]),
  );
} else {
  log_partition = Array.from(await entry("log_partition"), (code) => code / 256);
}
const log_tail_mass = label.head_size ? odds.map((odd) => -log1p_exp(-odd)) : label.temperatures.map(() => 0);
const gold_l = l((await entry("gold_logprobs"))[0]);

const j = label.temperatures.indexOf(temperature);
if (j < 0) throw new Error(`temperature ${temperature} is not stored`);
const log_p = (x, i) => x / label.temperatures[i] - log_partition[i];
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const weights = [
  ...head_l.map((x) => Math.exp(log_p(x, j))),
  ...tail_l.map((x, n) => ((tail_counts[n] / label.tail_draws) * Math.exp(log_p(x, j))) /
    mean(label.temperatures.map((_, i) => Math.exp(log_p(x, i) - log_tail_mass[i])))),
];
const plain = (values) => Array.from(values, (x) => (x === -Infinity ? null : x)); // JSON has no infinities
console.log(JSON.stringify({ head_ids: plain(head_ids), head_l: plain(head_l), tail_ids, tail_l, tail_counts,
  odds: plain(odds), gold_l: plain([gold_l])[0], log_partition, weights }));
