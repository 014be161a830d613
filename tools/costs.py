from tools.plan import count
