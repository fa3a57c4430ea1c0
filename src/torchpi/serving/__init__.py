"""Policies behind a websocket, for robots: openpi's protocol, which its clients and torchpi's speak."""
