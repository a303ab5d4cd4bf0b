
"use strict";
// Steps through games of two evaluations on the same board. All texts come from outside: they are
// only ever put into the page as text.
(() => {
  const data = JSON.parse(document.getElementById("games").textContent);
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const find = (name) => viewer.querySelector("[data-is=" + name + "]");
  const element = (tag, cls, text) => {
    const made = document.createElement(tag);
    if (cls) made.className = cls;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const left = find("left"), right = find("right"), board = find("board");
  const back = find("back"), next = find("next"), counter = find("counter");
  let step = 0;

  const gameOf = (side) => data.evaluations[side.value].games.find((g) => g.map === +board.value);

  // Frame `turn` of a game: what the policy is told and answers; the frame after the last turn
  // says how the game ended.
  const frame = (game, turn) => {
    const box = element("div", "frame");
    if (turn < game.turns.length) {
      const now = game.turns[turn];
      box.append(element("p", "label", "Turn " + (turn + 1) + ": the game says"));
      box.append(element("pre", "board", now.observation.trim()));
      box.append(element("p", "label", "The policy answers (" + game.tokens[turn] + " tokens)"));
      box.append(element("pre", "words answer", now.response));
      box.append(element("p", "label", "Action taken"));
      box.append(element("pre", "words", now.action));
    } else {
      box.append(element("p", "label", "The end, after " + game.turns.length + (game.turns.length === 1 ? " turn" : " turns")));
      box.append(element("pre", "words", game.outcome.trim()));
    }
    return box;
  };

  const pane = (place, side, turns) => {
    const evaluation = data.evaluations[side.value], game = gameOf(side);
    const head = element("h3", "", evaluation.title);
    place.replaceChildren(head);
    if (!game) {
      place.append(element("p", "soft", "This board's game was not kept."));
      return;
    }
    place.append(element("span", game.passed ? "won" : "lost", game.passed ? "won" : "lost"));
    for (const turn of turns(game)) place.append(frame(game, turn));
    if (evaluation.knowledge) {
      const more = element("details");
      more.append(element("summary", "", "Knowledge in the prompt"));
      more.append(element("pre", "words", evaluation.knowledge));
      place.append(more);
    }
  };

  const show = () => {
    const games = [gameOf(left), gameOf(right)].filter(Boolean);
    const last = Math.max(0, ...games.map((game) => game.turns.length));
    step = Math.min(step, last);
    const current = (game) => [Math.min(step, game.turns.length)];
    const all = (game) => [...game.turns.keys(), game.turns.length];
    pane(find("left-pane"), left, current);
    pane(find("right-pane"), right, current);
    pane(find("left-print"), left, all);
    pane(find("right-print"), right, all);
    back.disabled = step === 0;
    next.disabled = step === last;
    counter.textContent = step < last ? "turn " + (step + 1) + " of " + last : "the end";
  };

  data.evaluations.forEach((evaluation, index) => {
    for (const side of [left, right]) {
      const option = element("option", "", evaluation.title);
      option.value = index;
      side.append(option);
    }
  });
  const maps = new Set(data.evaluations.flatMap((e) => e.games.map((game) => game.map)));
  for (const map of [...maps].sort((a, b) => a - b)) {
    const option = element("option", "", String(map + 1));
    option.value = map;
    board.append(option);
  }
  left.value = data.before;
  right.value = data.after;
  for (const chosen of [left, right, board]) {
    chosen.addEventListener("change", () => {
      if (chosen === board) step = 0;
      show();
    });
  }
  const move = (by) => {
    step += by;
    show();
  };
  back.addEventListener("click", () => move(-1));
  next.addEventListener("click", () => move(1));
  // Engines that cannot open details by style sheet get them opened for the printer.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
  });
  show();
})();
