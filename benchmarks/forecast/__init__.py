"""How wrong forecasts are on published latencies that they have not seen."""
