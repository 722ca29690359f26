// Draws the plots with the page's own colours, and again when it turns dark or light.
"use strict";
(function () {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const narrow = function () { return window.innerWidth < 640; };

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function arms(points, key, shade) {
    return {
      type: "data", symmetric: false, thickness: 1, width: 3, color: shade,
      arrayminus: points.map(function (p) { return p[key][0]; }),
      array: points.map(function (p) { return p[key][1]; }),
    };
  }

  // Where each name stands: the first place around its point that covers no point and no other name.
  function places(plot, box) {
    const size = [box.clientWidth - 75, box.clientHeight - 70];
    const at = plot.points.map(function (p) {
      return [p.x, p.y].map(function (v, k) {
        const share = (v - plot.range[k][0]) / (plot.range[k][1] - plot.range[k][0]);
        return size[k] * (k ? 1 - share : share);
      });
    });
    const taken = at.map(function (p) { return [p[0] - 8, p[1] - 8, p[0] + 8, p[1] + 8]; });
    return plot.points.map(function (point, i) {
      const width = 7 * point.name.length, x = at[i][0], y = at[i][1];
      const found = {
        "top right": [x + 9, y - 22, x + 9 + width, y - 6], "top left": [x - 9 - width, y - 22, x - 9, y - 6],
        "bottom right": [x + 9, y + 6, x + 9 + width, y + 22], "bottom left": [x - 9 - width, y + 6, x - 9, y + 22],
        "top center": [x - width / 2, y - 24, x + width / 2, y - 8],
        "bottom center": [x - width / 2, y + 8, x + width / 2, y + 24],
      };
      let best = null;
      Object.keys(found).forEach(function (name) {
        const b = found[name];
        const hits = taken.filter(function (t) { return b[0] < t[2] && t[0] < b[2] && b[1] < t[3] && t[1] < b[3]; });
        const cost = hits.length + (b[0] < 0 || b[2] > size[0] || b[1] < 0 || b[3] > size[1] ? 10 : 0);
        if (best === null || cost < best.cost) { best = { name: name, cost: cost, box: b }; }
      });
      taken.push(best.box);
      return best.name;
    });
  }

  function traces(plot, box) {
    const where = places(plot, box);
    plot.points.forEach(function (p, i) { p.place = where[i]; });
    const kinds = [["reference", "square", "reference"], ["best", "circle", "undominated"], ["other", "diamond", "beaten"]];
    const made = [{
      x: plot.join.map(function (p) { return p[0]; }), y: plot.join.map(function (p) { return p[1]; }),
      mode: "lines", line: { color: color("join"), width: 2 }, hoverinfo: "skip", showlegend: false,
    }];
    kinds.forEach(function (kind) {
      const points = plot.points.filter(function (p) { return p.kind === kind[0]; });
      if (!points.length) { return; }
      const shade = color(kind[0]);
      made.push({
        x: points.map(function (p) { return p.x; }), y: points.map(function (p) { return p.y; }),
        text: points.map(function (p) { return escaped(p.name); }),
        customdata: points.map(function (p) { return p.hover; }),
        hovertemplate: "%{customdata}<extra></extra>",
        mode: narrow() ? "markers" : "markers+text", cliponaxis: false,
        textposition: points.map(function (p) { return p.place; }),
        textfont: { color: color("ink"), size: 12 },
        marker: { symbol: kind[1], size: 11, color: shade },
        error_x: arms(points, "x_arms", shade), error_y: arms(points, "y_arms", shade),
        name: kind[2], type: "scatter",
      });
    });
    return made;
  }

  // Plotly reads some HTML in texts: names are shown as they are.
  function escaped(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function draw() {
    plots.forEach(function (plot, i) {
      const axis = { gridcolor: color("line"), zeroline: false, linecolor: color("line") };
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("ink") },
        margin: { l: 55, r: 20, t: 20, b: 50 }, hovermode: "closest",
        hoverlabel: { align: "left", bgcolor: color("band"), bordercolor: color("line"), font: { color: color("ink") } },
        xaxis: Object.assign({ title: { text: plot.x_title }, range: plot.range[0] }, axis),
        yaxis: Object.assign({ title: { text: "score" }, range: plot.range[1] }, axis),
        legend: { orientation: "h", y: 1.08 },
      };
      const box = document.getElementById("plot" + i);
      Plotly.react(box, traces(plot, box), layout, { responsive: true, displayModeBar: false, plotlyServerURL: "" });
    });
    document.documentElement.dataset.drawn = String(plots.length);
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let wide = !narrow();
  window.addEventListener("resize", function () {
    if (wide === narrow()) { wide = !narrow(); draw(); }
  });
})();
