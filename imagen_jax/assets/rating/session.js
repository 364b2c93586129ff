"use strict";

// The answers of one rater, independent of the screen. A rater has a number n and rates the trials
// of schedules[n - 1] in order. Positions count the trials of that schedule from 0. Nothing leaves
// the browser: the answers are kept in localStorage and downloaded as a file of JSON lines.

const byId = (id) => document.getElementById(id);
const study = JSON.parse(byId("study").textContent);
const STORE = `rating/${study.study}/${study.run}`;

let number = 0; // of the rater, from 1; 0 before the start
// What is stored. `records` are the finished trials, by position: {answers, ms, skipped, revision}.
// `position` is the trial on the screen; it is less than records.length after going back.
// `open` has the answers given so far to unfinished trials, by position: {answers, ms}.
let session = null; // {rater, position, records, open}

// Trials

const schedule = () => study.schedules[number - 1];

/** The trial at a position; `sides` has the tokens as shown, from the left. */
function trialAt(position) {
  const [index, swapped] = schedule()[position];
  const trial = study.trials[index];
  return { ...trial, sides: swapped ? [...trial.sets].reverse() : trial.sets };
}

// Storage

/** localStorage, or null if the browser refuses it. */
function usableStorage() {
  try {
    window.localStorage.setItem(`${STORE}/probe`, "1");
    window.localStorage.removeItem(`${STORE}/probe`);
    return window.localStorage;
  } catch {
    return null;
  }
}

const local = usableStorage();

function stored(n) {
  try {
    const value = JSON.parse(local?.getItem(`${STORE}/${n}`) ?? "null");
    return Array.isArray(value?.records) ? value : null;
  } catch {
    return null; // damaged: start again
  }
}

function save() {
  try {
    local.setItem(`${STORE}/${number}`, JSON.stringify(session));
  } catch {
    byId("notice").hidden = false;
  }
}

/** The rater number in a text, or 0. */
function validNumber(text) {
  const n = /^\d{1,9}$/.test(text.trim()) ? Number(text) : 0;
  return n <= study.schedules.length ? n : 0;
}

/** A random rater number; one that this browser has not used, if possible. */
function drawnNumber() {
  const all = study.schedules.map((_, index) => index + 1);
  const free = all.filter((n) => !stored(n));
  const from = free.length ? free : all;
  return from[Math.floor(Math.random() * from.length)];
}

function randomHex(bytes) {
  const values = crypto.getRandomValues(new Uint8Array(bytes));
  return [...values].map((value) => value.toString(16).padStart(2, "0")).join("");
}

// Export

function records() {
  return session.records.map((record, position) => {
    const { id, prompt, sides } = trialAt(position);
    return {
      version: study.version,
      study: study.study,
      run: study.run,
      rater: session.rater,
      number,
      position,
      trial: id,
      prompt,
      left: sides[0],
      right: sides[1] ?? null,
      answers: record.answers,
      ms: record.ms,
      skipped: record.skipped,
      revision: record.revision,
      records: session.records.length,
    };
  });
}

const exported = () => records().map((record) => `${JSON.stringify(record)}\n`).join("");
