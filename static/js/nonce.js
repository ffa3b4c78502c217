// Lets the terminal style itself under a policy without inline style: <style> elements it makes carry the page's nonce, and
// what it sets as a style attribute (24-bit colours) goes through the object model, which the policy does not restrict.

const nonce = document.querySelector('meta[name="csp-nonce"]')?.content;
const create = document.createElement.bind(document);
document.createElement = (name, options) => {
  const element = create(name, options);
  if (nonce && String(name).toLowerCase() === "style") element.nonce = nonce;
  return element;
};

const set = Element.prototype.setAttribute;
Element.prototype.setAttribute = function (name, value) {
  if (name === "style" && this.style) this.style.cssText = value;
  else set.call(this, name, value);
};
