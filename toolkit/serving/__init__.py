"""Serving: keeps engines, router and front alive, proves what they serve, changes adapters under traffic."""
