"""Capacity and cost of the service, by simulation, before there is a cluster. Starts no Ray and loads no model."""
