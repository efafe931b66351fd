// What the controls do. All text goes in as text.
(function () {
  const runs = JSON.parse(document.getElementById("data").textContent);

  function show(element, value, digits) {
    element.textContent =
      value === null
        ? "-"
        : value.toLocaleString("en-US", {
            minimumFractionDigits: digits,
            maximumFractionDigits: digits,
          });
  }

  function positive(input) {
    const value = Number(input.value);
    const good = input.value.trim() !== "" && Number.isFinite(value) && value >= Number(input.min);
    input.setAttribute("aria-invalid", String(!good));
    return good ? value : null;
  }

  const slider = document.getElementById("link");
  const exact = document.getElementById("link-exact");

  function handovers(link) {
    for (const row of document.querySelectorAll("tr[data-sent]")) {
      const [run, index] = row.dataset.sent.split(" ").map(Number);
      const seconds = ({ sent_bytes, encode_s, decode_s }) =>
        handoverSeconds(sent_bytes, link, encode_s, decode_s);
      const own = seconds(runs[run].sent[index]);
      const first = seconds(runs[run].sent[0]);
      const ms = own * 1e3;
      show(row.querySelector(".ms"), ms, ms < 10 ? 3 : 1);
      show(row.querySelector(".faster"), own > 0 ? first / own : null, 2);
    }
  }

  if (slider) {
    slider.addEventListener("input", () => {
      const link = 10 ** Number(slider.value);
      exact.value = String(Number(link.toPrecision(3)));
      slider.setAttribute("aria-valuetext", exact.value + " Gbit/s");
      positive(exact);
      handovers(Number(exact.value));
    });
    exact.addEventListener("input", () => {
      const link = positive(exact);
      if (link === null) return;
      slider.value = String(Math.log10(link));
      slider.setAttribute("aria-valuetext", exact.value + " Gbit/s");
      handovers(link);
    });
    handovers(Number(exact.value));
  }

  function savings(box) {
    const given = runs[Number(box.dataset.savings)].savings;
    const part = (name) => box.querySelector("[data-is='" + name + "']");
    const price = part("price");
    const work = part("work");
    const watts = part("watts");
    const which = part("case");
    let ownWork = given.search_s === null;

    function update() {
      const gpuHour = positive(price);
      if (gpuHour === null) return;
      if (!ownWork) work.value = String(Number(workCost(given.search_s, gpuHour).toPrecision(6)));
      const typed = ownWork ? positive(work) : workCost(given.search_s, gpuHour);
      const asked = which.value === "";
      const one = asked ? null : given.cases[Number(which.value)];
      const dense = asked ? given.dense_gpus : null;
      const pruned = asked ? given.pruned_gpus : null;
      const both = dense !== null && pruned !== null;
      const gpus = asked ? (both ? dense - pruned : null) : one.gpus;
      const saving = asked
        ? savingAYear(dense, pruned, gpuHour)
        : moneyAYear(one.gpus, gpuHour);
      const power = watts.value.trim() === "" ? null : positive(watts);
      show(part("dense-gpus"), dense, 0);
      show(part("pruned-gpus"), pruned, 0);
      show(part("saved-gpus"), gpus, 0);
      show(part("dense-money"), moneyAYear(dense, gpuHour), 0);
      show(part("pruned-money"), moneyAYear(pruned, gpuHour), 0);
      show(part("saved-money"), saving, 0);
      for (const [name, count] of [["dense", dense], ["pruned", pruned], ["saved", gpus]]) {
        show(part(name + "-kwh"), power === null ? null : kwhAYear(count, power), 0);
      }
      const hours = typed === null ? null : breakEvenHours(typed, saving);
      part("paid").textContent =
        saving === null
          ? "No saving can be said. " + (one === null ? given.reasons.join(" ") : one.reason)
          : hours === null
            ? "The work is never paid at these inputs."
            : "The work is paid after " +
              hours.toLocaleString("en-US", { maximumFractionDigits: 1 }) +
              " hours of serving.";
    }

    work.addEventListener("input", () => {
      ownWork = true;
      update();
    });
    for (const input of [price, watts, which]) input.addEventListener("input", update);
    update();
  }

  document.querySelectorAll("[data-savings]").forEach(savings);
})();
