"use strict";
// The formulas of pdtrim.cost, in the same order of operations: a test holds them equal.
const HOURS_A_YEAR = 8760;

/** Bytes, Gbit/s and seconds of a codec; a codec whose time is not known counts as none. */
function handoverSeconds(sentBytes, linkGbitS, encodeS, decodeS) {
  return (encodeS ?? 0) + (sentBytes * 8) / (linkGbitS * 1e9) + (decodeS ?? 0);
}

function moneyAYear(gpus, gpuHour) {
  return gpus === null ? null : gpus * gpuHour * HOURS_A_YEAR;
}

function savingAYear(denseGpus, prunedGpus, gpuHour) {
  const before = moneyAYear(denseGpus, gpuHour);
  const after = moneyAYear(prunedGpus, gpuHour);
  return before === null || after === null ? null : before - after;
}

function breakEvenHours(workCost, saving) {
  return saving !== null && saving > 0 ? (workCost / saving) * HOURS_A_YEAR : null;
}

function kwhAYear(gpus, gpuWatts) {
  return gpus === null ? null : (gpus * HOURS_A_YEAR * gpuWatts) / 1e3;
}

function workCost(searchS, gpuHour) {
  return (searchS / 3600) * gpuHour;
}
