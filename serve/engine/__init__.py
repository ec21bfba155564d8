"""The engine replica: fair batching, models in memory, forecasts. Knows neither HTTP nor Ray."""
