"""The engine side of serving. Knows neither HTTP nor Ray."""
