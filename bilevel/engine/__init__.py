"""How derivatives are computed: the only place that calls torch.autograd and torch.func."""
