"""Token ids: records that are them already, and making them in several processes."""
