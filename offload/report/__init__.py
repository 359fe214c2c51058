"""Reports for people: one self-contained HTML page of facts, tables and charts.

Owns how numbers look. Computes none, and knows neither models nor caches: callers bring labels and values.
"""

from offload.report.charts import Curve, heat_map, line_chart, stacked_bars
from offload.report.page import Page

__all__ = ["Curve", "Page", "heat_map", "line_chart", "stacked_bars"]
