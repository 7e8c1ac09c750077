"""Where weights come from: profiles, packages, the hub, and the folder that keeps them."""
