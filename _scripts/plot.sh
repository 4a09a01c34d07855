#!/usr/bin/env bash
# Draws docs/performance.svg from docs/performance.csv: writes a second, and their 99th percentile, against clients.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

awk -F, '
function x(c) { return left + log(c) / log(most) * wide }
function y(v, top, max) { return top + high - v / max * high }
function line(who, column, top, max, colour,  i, path) {
  for (i = 1; i <= n; i++)
    path = path (i == 1 ? "M" : "L") sprintf("%.1f %.1f", x(clients[i]), y(value[who, clients[i], column], top, max))
  printf "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", path, colour
  for (i = 1; i <= n; i++)
    printf "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x(clients[i]), y(value[who, clients[i], column], top, max), colour
}
function panel(title, column, top,  max, i, step) {
  for (i = 1; i <= n; i++) {
    if (value["ours", clients[i], column] > max) max = value["ours", clients[i], column]
    if (value["etcd", clients[i], column] > max) max = value["etcd", clients[i], column]
  }
  step = 10 ^ int(log(max) / log(10))
  if (max / step < 3) step /= 2
  max = step * (int(max / step) + 1)
  printf "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", left, top - 12, title
  for (i = 0; i <= max; i += step) {
    printf "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" stroke=\"#ddd\"/>\n", left, y(i, top, max), left + wide, y(i, top, max)
    printf "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%d</text>\n", left - 8, y(i, top, max) + 4, i
  }
  for (i = 1; i <= n; i++) printf "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n", x(clients[i]), top + high + 18, clients[i]
  line("etcd", column, top, max, "#999")
  line("ours", column, top, max, "#0a6")
}
$2 == "write" {
  value[$1, $3, "rate"] = $4; value[$1, $3, "p99"] = $6
  if ($1 == "ours") { clients[++n] = $3; if ($3 > most) most = $3 }
}
END {
  left = 70; wide = 480; high = 180
  print "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 600 540\" font-family=\"sans-serif\" font-size=\"12\">"
  print "<rect width=\"600\" height=\"540\" fill=\"white\"/>"
  panel("durable writes a second, three nodes, 256-byte values", "rate", 40)
  panel("99th percentile, ms", "p99", 300)
  printf "<text x=\"%d\" y=\"525\">clients (closed loop)</text>\n", left
  printf "<text x=\"%d\" y=\"525\" fill=\"#0a6\" font-weight=\"bold\">this service</text><text x=\"%d\" y=\"525\" fill=\"#777\" font-weight=\"bold\">etcd</text>\n", left + 330, left + 430
  print "</svg>"
}' docs/performance.csv >docs/performance.svg
