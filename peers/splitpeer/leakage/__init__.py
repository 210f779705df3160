"""How much leaked: figures of reconstructions and recovered masks, with floors and intervals over patients."""
