"""Save and load with Fabric."""
